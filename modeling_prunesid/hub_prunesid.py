"""What lets Auto classes, pipelines and the Hub treat our classes as they treat the stock ones."""

import os
from typing import Any

from transformers.models.auto import modeling_auto


# Tables of Transformers in which pipelines and serving look up the names of classes with a head.
_CLASS_NAME_TABLES = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")


def register_class_names(model_type: str, class_name: str, base_name: str) -> None:
    """List our classes where Transformers looks names up; a table that a later version lacks is passed over."""
    for table, name in (*((table, class_name) for table in _CLASS_NAME_TABLES), ("MODEL_MAPPING_NAMES", base_name)):
        names = getattr(modeling_auto, table, None)
        if names is not None:
            names[model_type] = name


class HubModelMixin:
    """A saved model carries the code that loads it, for every Auto class."""

    # Auto class: name of ours, in the modeling file of the family.
    _auto_map: dict[str, str] = {}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        config_class, module = type(self.config), type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {
            "AutoConfig": f"{config_class.__module__.rsplit('.', 1)[-1]}.{config_class.__name__}",
            **{auto_class: f"{module}.{name}" for auto_class, name in self._auto_map.items()},
        }
        super().save_pretrained(save_directory, **kwargs)
