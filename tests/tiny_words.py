"""A tokenizer of words that are numbers: `word7` is token 7."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(names, specials, size=120, **settings):
    """Words 0 to `size - 1`, some by other `names`: `<pad>`, `<s>`, `</s>`, `<unk>` and what is special besides."""
    words = [names.get(index, f"word{index}") for index in range(size)]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(specials),
        **settings,
    )
