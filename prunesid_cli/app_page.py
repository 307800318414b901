"""The page: Gradio's components, what they do, and the words a visitor reads."""

import html
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr

from modeling_prunesid.methods import METHODS
from modeling_prunesid.visualize import Explanation
from prunesid_cli import baselines
from prunesid_cli.app_model import INSIDE, MAX_NEW_TOKENS, Answer, AppModel, Choice, Picture
from prunesid_cli.app_picture import draw, draw_pair, draw_small, draw_whole, explain_numbers
from prunesid_cli.app_upload import MAX_BYTES, read_address, read_upload
from prunesid_cli.images import open_image


FILES = Path(__file__).with_name("app_files")
STRIP = (192 / 576, 128 / 576, 64 / 576, 32 / 576)  # of the squares
MAX_WAITING = 64  # visitors in the queue
KEPT_FOR = 3600  # seconds that a visitor's picture is kept
QUESTION_LENGTH = 500
EXAMPLES = {  # a question for each picture of `app_files`
    "Burgers": ("example_1.jpg", "how many times does the burger appear?"),
    "Balloons": ("example_2.jpg", "how many times does the balloon appear?"),
    "A sign": ("example_3.jpg", "what word is printed?"),
}
METHOD_NAMES = {
    "paper": ("PruneSID, as the paper has it", "it puts squares that look alike into groups, drops near-copies in "
              "each group, and keeps the most typical squares of every group"),
    "release": ("PruneSID, as its authors' code has it", "the same groups, but it prefers squares that the vision "
                "model itself looks at"),
    "spread": ("Spread", "it takes squares that the vision model looks at, each as unlike those already "
               "taken as possible"),
}  # fmt: skip
INSIDE_THEN = "the language model reads all squares in its first layers, and after them"
# The compared methods, names of `prunesid_cli.baselines.METHODS`.
COMPARED = {
    "prunesid-auto": ("PruneSID, automatic threshold", "the paper's method, with the strictest threshold that leaves "
                      "enough squares"),
    "prunesid-llm": ("PruneSID, inside the language model too", "the same, and later layers of the language model "
                     "keep fewer squares than the first"),
    "random": ("Chance", "it takes squares at random, the bar that any method must clear"),
    "uniform": ("An even grid", "it takes squares at even distances, whatever they show"),
    "hired": ("HiRED", "it takes the squares that the vision model looks at most"),
    "divprune": ("DivPrune", "it takes squares that are as unlike each other as possible"),
    "dpp": ("DPP", "it takes a set of squares that are unlike each other, all of them together"),
    "vispruner": ("VisPruner", "it takes squares that are looked at, and then ones that are unlike each other"),
    "visionzip": ("VisionZip", "it takes the squares that are looked at most, and merges the others into a few more"),
    "prumerge": ("LLaVA-PruMerge", "it takes the squares that are looked at most, and adds to each of them its likes"),
    "prumerge+": ("LLaVA-PruMerge+", "half are the squares that are looked at most, half are at even distances; each "
                  "takes in its likes"),
    "tome": ("ToMe", "it merges squares that are alike, layer by layer, while the vision model works"),
    "hiprune": ("HiPrune", "it takes squares on objects, the squares around these, and some that sum up the picture"),
    "cdpruner": ("CDPruner", "it reads the question: it takes squares that fit it and are unlike each other"),
    "downsample-image": ("A smaller picture", "the picture itself is made smaller; a bright square is the middle of a "
                         "larger one"),
    "downsample-features": ("Averaged squares", "neighbouring squares are averaged; a bright square is the middle of "
                            "each average"),
    "fastv": ("FastV", f"{INSIDE_THEN} only those that the question looks at"),
    "dart": ("DART", f"{INSIDE_THEN} only those that repeat the others least"),
    "sparsevlm-v1.5": ("SparseVLM", f"{INSIDE_THEN} fewer and fewer, by what the words of the question look at"),
    "mustdrop": ("MustDrop", "the vision model merges like neighbours, and the language model drops more by the "
                 "question"),
    "vitcop": ("ViTCoP", "the vision model drops some squares, and the language model more, group by group"),
}  # fmt: skip
INTRODUCTION = """
# What does an AI need to see of a picture?

An AI that answers questions about pictures cuts a picture into small squares and reads them one after another, as it
reads words. (Each square is a *visual token*.) Most squares repeat others: more wall, more sky. Here only some squares
are kept, and you see what that does to the answer and to the time it takes.
**Bright squares are kept, dark ones are dropped.**
"""
SMALL_MODEL = (
    "The model of this page is a very small one, made for demonstration: it knows 112 words and scenes like the three "
    "examples. It answers questions such as *is there any cat in the picture?*, *how many times does the car "
    "appear?*, *where is the key?*, *what colour is the book?*, *what number is printed?*, *what word is printed?*"
)
WAITING = "Press **Ask** for the answers."


def methods_for(model: AppModel) -> list[str]:
    """The methods of the package, those that were added to it, and the compared ones that fit the model."""
    own_class, picture = type(model.model).__name__, example_pictures()[0]
    fitting = [
        name
        for name in COMPARED
        if baselines.METHODS[name].any_family or own_class == "PruneSIDLlavaForConditionalGeneration"
    ]
    if model.name is None:  # all of them do
        return [*METHODS, *fitting]
    return [name for name in [*METHODS, *fitting] if name == model.own_method or model.fits(name, picture)]


def name_of(method: str) -> str:
    return (METHOD_NAMES | COMPARED).get(method, (method.replace("_", " "), ""))[0]


def meaning_of(method: str) -> str:
    """What a method does, for a visitor; of one without words of its own, what its file says first."""
    if method in METHOD_NAMES | COMPARED:
        return (METHOD_NAMES | COMPARED)[method][1]
    return (sys.modules[METHODS[method].__module__].__doc__ or "").strip().split("\n")[0].rstrip(".")


def example_pictures() -> list[Image.Image]:
    return [open_image(FILES / file) for file, _ in EXAMPLES.values()]


def say(text: str, is_error: bool = False) -> str:
    kind = ' ps-error" role="alert' if is_error else '" role="status'
    return f'<div class="ps-status{kind}">{html.escape(text)}</div>'


def sentence_of(error: Exception) -> str:
    """What went wrong, for a visitor; the log has the rest of what was not foreseen."""
    if isinstance(error, ValueError):
        return str(error)
    print(f"prunesid app: {type(error).__name__}: {error}", file=sys.stderr)
    return "Something went wrong on the server. Try again, or another picture."


def frames_of(picture: Picture) -> tuple[Image.Image, ...]:
    return (picture,) if isinstance(picture, Image.Image) else picture


class Page:
    """What the events of the page call. A picture is a visitor's own; the model is everybody's."""

    def __init__(self, model: AppModel):
        self.model, self.methods = model, methods_for(model)

    def open_file(self, path: str | None) -> tuple:
        """The picture of an upload, what to say of it, and an empty place for the next one."""
        if path is None:
            return gr.skip(), gr.skip(), gr.skip()
        return *self._open(lambda: read_upload(path)), None

    def open_address(self, address: str) -> tuple:
        return self._open(lambda: read_address(address))

    def _open(self, read) -> tuple:
        try:
            picture = read()
        except Exception as error:
            text = f"{sentence_of(error)} The picture on the page is the one before."
            gr.Warning(html.escape(text))  # beside the upload on a small screen, which the status is not
            return gr.skip(), say(text, True)
        if isinstance(picture, Image.Image):
            return picture, say("Here is your picture. Ask something about it.")
        whole = "Ask something about it." if self.model.reads_clips else "The model of this page reads a frame of it."
        return picture, say(f"Here are {len(picture)} frames of your clip. {whole}")

    def subject(self, picture: Picture | None, part: float) -> Picture:
        """What the model is shown: a picture, or a clip, or a frame of that where the model reads no clips."""
        if picture is None:
            raise ValueError("Choose a picture first: drop one in, or take an example.")
        if isinstance(picture, Image.Image) or self.model.reads_clips:
            return picture
        return picture[min(max(int(part), 1), len(picture)) - 1]

    def choice(self, budget: float, method: str, is_dynamic: bool) -> Choice:
        if method not in self.methods:
            raise ValueError(f"There is no method {method!r}.")
        return Choice(max(int(budget), 1), method, bool(is_dynamic))

    def parts(self, picture: Picture, views: list[Explanation] | None, part: float) -> Any:
        """The slider for the frames of a clip, or the crops or tiles of a picture; hidden where there is one."""
        is_clip = not isinstance(picture, Image.Image)
        count = len(frames_of(picture)) if is_clip and not self.model.reads_clips else len(views or [None])
        label = f"Frame of the clip, of {count}" if is_clip else f"Part of the picture that is shown, of {count}"
        return gr.update(maximum=max(count, 2), visible=count > 1, label=label, value=min(max(int(part), 1), count))

    def show(self, picture, question: str, budget: float, method: str, is_dynamic: bool, part: float = 1) -> tuple:
        """Status, picture, its numbers, the code and the two sliders, for what is chosen."""
        try:
            subject = self.subject(picture, part)
            choice = self.choice(budget, method, is_dynamic)
            code = code_for(self.model, question, choice, not isinstance(subject, Image.Image))
            rows, columns = self.model.grid_of(subject)
            total, is_clip = rows * columns, not isinstance(subject, Image.Image)
            limit = gr.skip()
            if not self.model.has_one_grid or is_clip:
                limit = gr.update(maximum=total, value=min(int(budget), total), label=f"Squares to keep, of {total}")
            if (choice.budget or 0) >= total and not is_dynamic:
                whole = f"All {total} squares are kept: nothing is dropped. Move the slider to the left."
                drawn = draw_whole(frames_of(subject)[0], (rows, columns), self.model.is_cropped and not is_clip)
                return say(whole), drawn, "", code, self.parts(picture, None, part), limit
            views = self.model.look(subject, choice, question)
        except Exception as error:
            return say(sentence_of(error), True), gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        seen = views[min(max(int(part), 1), len(views)) - 1]
        total, kept = seen.grid[0] * seen.grid[1], len(seen.kept)
        is_short = kept == (choice.budget or 0) - 1 and not (is_dynamic or choice.is_compared)
        summary = ", and one token that sums up the whole picture (CLS)" if is_short else ""
        where = "reach the language model"
        told = f"{kept} of {total} squares are kept{summary}."
        if choice.is_compared and baselines.METHODS[method].place in INSIDE:
            where = "reach the last layer of the language model"
            told = f"{kept} of {total} squares {where}; its first layers read more."
        told = f"{told} {name_of(method)}: {meaning_of(method)}."
        shown = subject if isinstance(subject, Image.Image) else subject[0]
        return (
            say(told),
            draw(shown, seen),
            explain_numbers(seen, where),
            code,
            self.parts(picture, views, part),
            limit,
        )

    def ask(
        self, picture, question: str, budget: float, method: str, is_dynamic: bool, part: float = 1
    ) -> Iterator[tuple]:
        """Status, both answers and their numbers, as they are written."""
        question = (question or "").strip()[:QUESTION_LENGTH]
        try:
            subject = self.subject(picture, part)
            if not question:
                raise ValueError("Type a question about the picture first.")
            choice = self.choice(budget, method, is_dynamic)
            answers = [Answer(), Answer()]
            yield say("The model reads the whole picture …"), "…", "", table_of(answers)
            for place, one in enumerate((Choice(None, self.model.own_method), choice)):
                for answers[place] in self.model.answer(subject, question, one):
                    status = "The model reads " + ("the kept squares …" if place else "the whole picture …")
                    texts = [answer.text or ("…" if at == place else "") for at, answer in enumerate(answers)]
                    yield say(status), *texts, table_of(answers)
            unknown = self.model.unknown_words(question)
            words = ", ".join(f"“{word[:30]}”" for word in unknown[:8])
            told = f" It does not know: {words}. Its answers may make no sense." if unknown else ""
            is_same = "the same" if answers[0].text == answers[1].text else "another one"
            squares = f"{answers[1].visual_tokens} of {answers[0].visual_tokens} squares"
            told = f"Done. From {squares}, the answer is {is_same}.{told}"
            yield say(told, bool(unknown)), answers[0].text, answers[1].text, table_of(answers)
        except Exception as error:
            yield say(sentence_of(error), True), gr.skip(), gr.skip(), gr.skip()

    def strip(self, picture, question: str, method: str, part: float = 1) -> str:
        """The picture at four budgets."""
        try:
            figures = []
            if picture is not None:
                subject = self.subject(picture, part)
                rows, columns = self.model.grid_of(subject)
                for share in STRIP:
                    budget = max(round(share * rows * columns), 1)
                    if budget < rows * columns:
                        views = self.model.look(subject, self.choice(budget, method, False), question)
                        seen = views[min(max(int(part), 1), len(views)) - 1]
                        figures.append(draw_small(frames_of(subject)[0], seen, f"{budget} squares"))
            return f'<div class="ps-strip">{"".join(figures)}</div>'
        except Exception as error:
            return say(sentence_of(error), True)

    def compare(self, picture, question: str, budget: float, first: str, second: str, part: float = 1) -> str:
        """Two methods beside each other."""
        try:
            subject = self.subject(picture, part)
            one, other = (
                self.model.look(subject, self.choice(budget, method, False), question) for method in (first, second)
            )
            place = min(max(int(part), 1), len(one), len(other)) - 1
            return draw_pair(frames_of(subject)[0], one[place], other[place], (name_of(first), name_of(second)))
        except Exception as error:
            return say(sentence_of(error), True)


def table_of(answers: list[Answer]) -> str:
    """Both runs in numbers, and their ratios."""

    def row(label: str, name: str, write) -> str:
        full, kept = (getattr(answer, name) for answer in answers)
        cells = ["" if value is None else write(value) for value in (full, kept)]
        ratio = "" if not full or not kept else f"{full / kept:.1f} times less"
        if ratio and full < kept:
            ratio = f"{kept / full:.1f} times more"
        return f"<tr><th scope='row'>{label}</th>" + "".join(f"<td>{cell}</td>" for cell in (*cells, ratio)) + "</tr>"

    rows = (
        row("Squares read (visual tokens)", "visual_tokens", str),
        row("Time to the first word", "first_token_seconds", lambda value: f"{1000 * value:.0f} ms"),
        row("Memory for what was read (KV cache)", "cache_bytes", lambda value: f"{value / 2**20:.2f} MB"),
    )
    return (
        "<table class='ps-table'><thead><tr><td></td><th scope='col'>All</th><th scope='col'>Kept</th>"
        f"<th scope='col'>Saved</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "<caption>Each was run once, on the machine of this page.</caption></table>"
    )


def code_for(model: AppModel, question: str, choice: Choice, is_clip: bool = False) -> str:
    """Python that gives what is on the page."""
    settings = model.settings_of(choice)
    if model.name is None:
        source = "from prunesid_cli.embedded import complete\n"
        name = "complete()  # the small model of the page"
    else:
        source, name = "", repr(model.name)
    imported, indent = "PruneSIDForImageTextToText, explain, visualize", ""
    before, after = "", 'visualize(picture, explain(model, processor, picture)).save("kept.png")\n'
    reader, opened = "images import open_image", 'picture = open_image("picture.png")'
    if choice.is_compared:
        source = f"from prunesid_cli.baselines import applied\n{source}"
        before, indent = f"with applied(model, {choice.method!r}, {choice.budget}):\n", "    "
        after = f"    {after}" if baselines.METHODS[choice.method].any_family else ""
    if is_clip:
        reader, opened = "clip_frames import ask_about_clip, read_frames", 'frames = read_frames("clip.mp4")'
        after = after.replace("explain(model, processor, picture)", "explain_views(model, processor, frames)[0]")
        after = after.replace("visualize(picture, ", "visualize(frames[0], ")
        imported = "PruneSIDForImageTextToText, visualize"
        source = f"from modeling_prunesid.visualize import explain_views\n{source}"
    if not after:
        imported = "PruneSIDForImageTextToText"
    lines = f"""{opened}  # yours
inputs = ask_about_clip(processor, frames, {question!r}).to(model.device, model.dtype)
"""
    if not is_clip:
        content = f'[{{"type": "image", "image": picture}}, {{"type": "text", "text": {question!r}}}]'
        lines = f"""{opened}  # yours
messages = [{{"role": "user", "content": {content}}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
"""
    return f"""from transformers import AutoProcessor

from modeling_prunesid import {imported}
{source}from prunesid_cli.{reader}

name = {name}
model = PruneSIDForImageTextToText.from_pretrained(name, dtype="auto", prunesid_config={settings!r})
processor = AutoProcessor.from_pretrained(name)
processor.num_visual_tokens = None  # full prompts, which leave the budget to the model

{lines}{before}{indent}output = model.generate(**inputs, max_new_tokens={MAX_NEW_TOKENS}, do_sample=False)
{after}print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def build(model: AppModel) -> gr.Blocks:
    """The page of a model."""
    page = Page(model)
    methods = [(name_of(method), method) for method in page.methods]
    own = model.own_budget
    budget = own if isinstance(own, int) else round((own or 1 / 9) * model.num_patches)
    one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    with gr.Blocks(
        title="What does an AI need to see?", analytics_enabled=False, delete_cache=(600, KEPT_FOR)
    ) as blocks:
        picture = gr.State(time_to_live=KEPT_FOR)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                gr.Markdown("### 1. A picture, or a clip")
                examples = [
                    gr.Button(label, icon=str(FILES / file), size="sm") for label, (file, _) in EXAMPLES.items()
                ]
                file = gr.File(
                    label=f"Or your own picture or clip (up to {MAX_BYTES // 2**20} MB)", height=130, elem_id="file"
                )
                address = gr.Textbox(
                    label="Or its address on the web, then Enter", placeholder="https://", max_lines=1
                )
                gr.Markdown("### 2. A question")
                question = gr.Textbox(label="Question", max_length=QUESTION_LENGTH, max_lines=3, elem_id="question")
                gr.Markdown("### 3. How much may it see?")
                slider = gr.Slider(
                    1,
                    model.num_patches,
                    value=budget,
                    step=1,
                    label=f"Squares to keep, of {model.num_patches}",
                    elem_id="budget",
                    buttons=[],
                )
                dynamic = gr.Checkbox(
                    label="More for busy pictures, fewer for plain ones",
                    info="The number above is then what a typical picture gets.",
                    elem_id="dynamic",
                )
                method = gr.Dropdown(methods, value=model.own_method, label="How squares are chosen", elem_id="method")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                if model.name is None:
                    gr.Markdown(SMALL_MODEL)
            with gr.Column(scale=3, min_width=280):
                status = gr.HTML(say("Getting the first picture ready …"), elem_id="status")
                shown = gr.HTML(elem_id="picture")
                part = gr.Slider(1, 2, value=1, step=1, label="Part", visible=False, elem_id="part", buttons=[])
                with gr.Row():
                    full = gr.Textbox(label="Answer from all squares", lines=2, interactive=False, elem_id="full")
                    kept = gr.Textbox(label="Answer from the kept squares", lines=2, interactive=False, elem_id="kept")
                numbers = gr.HTML(table_of([Answer(), Answer()]), elem_id="numbers")
                sentences = gr.HTML(elem_id="sentences")
        with gr.Accordion("The same picture with fewer and fewer squares", open=True):
            strip = gr.HTML(elem_id="strip")
        with gr.Accordion("Two methods beside each other", open=False, elem_id="compare"):
            with gr.Row():
                first = gr.Dropdown(methods, value=methods[0][1], label="First method")
                second = gr.Dropdown(methods, value=methods[-1 if len(methods) < 3 else 2][1], label="Second method")
                compare = gr.Button("Compare", elem_id="compare-button")
            pair = gr.HTML(elem_id="pair")
        with gr.Accordion("The code for what you see", open=False, elem_id="code-accordion"):
            copy = gr.Button("Copy as code", elem_id="copy")
            code = gr.Code(language="python", interactive=False, show_label=False, elem_id="code")

        chosen = [picture, question, slider, method, dynamic, part]
        looked: list[Any] = [status, shown, sentences, code, part, slider]
        looks = {"fn": page.show, "inputs": chosen, "outputs": looked, **one_at_a_time}
        strips = {"fn": page.strip, "inputs": [picture, question, method, part], "outputs": [strip], **one_at_a_time}
        strips["show_progress"] = "hidden"
        asking = button.click(**looks, show_progress="hidden").then(
            page.ask, chosen, [status, full, kept, numbers], show_progress="hidden", **one_at_a_time
        )
        asking_by_key = question.submit(**looks, show_progress="hidden").then(
            page.ask, chosen, [status, full, kept, numbers], show_progress="hidden", **one_at_a_time
        )
        private: dict[str, Any] = {"api_visibility": "private"}

        def forget() -> tuple:
            return "", "", table_of([Answer(), Answer()])

        answers = [full, kept, numbers]
        stops: dict[str, Any] = {"cancels": [asking, asking_by_key], "queue": False, **private}
        question.input(forget, None, answers, **stops)
        for control in (slider, method, dynamic):
            control.change(forget, None, answers, **stops)
            control.change(**looks, show_progress="hidden", trigger_mode="always_last")
        if not model.reads_clips:  # another frame is another picture
            part.input(forget, None, answers, **stops)
        part.input(**looks, show_progress="hidden", trigger_mode="always_last").then(**strips)
        method.change(**strips)
        file.upload(page.open_file, file, [picture, status, file], concurrency_limit=4, **private)
        address.submit(page.open_address, address, [picture, status], concurrency_limit=8, **private)
        for label, (_, text) in EXAMPLES.items():
            place = list(EXAMPLES).index(label)
            take = lambda place=place, text=text: (example_pictures()[place], text)  # noqa: E731
            examples[place].click(take, None, [picture, question], **private)
        first_text = next(iter(EXAMPLES.values()))[1]
        blocks.load(lambda: (example_pictures()[0], first_text), None, [picture, question], **private)
        picture.change(lambda: (*forget(), "", 1), None, [*answers, pair, part], **stops)
        picture.change(**looks, show_progress="hidden").then(**strips)
        compare.click(page.compare, [picture, question, slider, first, second, part], [pair], **one_at_a_time)
        copy.click(None, code, None, js=COPY, **private)
    blocks.queue(max_size=MAX_WAITING, api_open=False)
    return blocks


COPY = """(code) => {
    const button = document.querySelector("#copy");
    const done = () => {
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy as code"; }, 2000);
    };
    const byHand = () => {
        const area = document.createElement("textarea");
        area.value = code;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
        done();
    };
    if (navigator.clipboard) navigator.clipboard.writeText(code).then(done, byHand); else byHand();
}"""


def launch(blocks: gr.Blocks, host: str, port: int | None, is_waiting: bool = True) -> str:
    """Serve the page, and return its address. Nothing on it comes from elsewhere, its fonts included."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    subdued = {"light": "*neutral_600", "dark": "*neutral_300"}  # Gradio's own greys are too pale to read
    for name in ("body_text_color_subdued", "block_info_text_color"):
        theme.set(**{name: subdued["light"], f"{name}_dark": subdued["dark"]})
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        max_file_size=MAX_BYTES,
        state_session_capacity=200,
        footer_links=["settings"],
        ssr_mode=False,
        theme=theme,
        css=(FILES / "page.css").read_text(),
        head=f"<script>{(FILES / 'page.js').read_text()}</script>",
    )
    print(f"The page is at {url} (Ctrl-C stops it).", flush=True)
    if is_waiting:
        blocks.block_thread()
    return url
