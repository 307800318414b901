"""A stand-in of lmms-eval's interface, on which the plugin's class runs where lmms-eval is not installed."""

import importlib
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest import mock


class Lmms:
    """What the plugin uses of `lmms_eval.api.model.lmms`."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    rank = property(lambda self: self._rank)


class ChatMessages:
    """What the plugin uses of `lmms_eval.protocol.ChatMessages`: contents hold their medium under `url`."""

    def __init__(self, messages):
        self.messages = messages

    def extract_media(self):
        parts = [part for message in self.messages for part in message["content"]]
        return tuple([part["url"] for part in parts if part["type"] == kind] for kind in ("image", "video", "audio"))

    def to_hf_messages(self):
        return self.messages


@contextmanager
def stand_in(metrics: list):
    """The plugin's module, imported with the stand-in. What it logs with `log_metrics` goes into `metrics`."""
    contents = {
        "lmms_eval.api.instance": {
            "GenerationResult": SimpleNamespace,
            "Instance": SimpleNamespace,
            "TokenCounts": SimpleNamespace,
        },
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models.model_utils.gen_metrics": {
            "log_metrics": lambda *args, additional_metrics: metrics.append(additional_metrics)
        },
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "loguru": {"logger": SimpleNamespace(info=print)},
    }
    modules: dict[str, ModuleType] = {}
    for name, attributes in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            package = ".".join(parts[:end])
            modules.setdefault(package, ModuleType(package))
        modules[name] = ModuleType(name)
        vars(modules[name]).update(attributes)
    with mock.patch.dict(sys.modules, {**modules}):
        name = "modeling_prunesid.lmms_eval"
        sys.modules.pop(name, None)
        yield importlib.import_module(name)
