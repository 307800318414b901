"""Configurations of families without a CLS token, or whose tokens are compared where it no longer is among them."""

from .configuration_prunesid import NestsPruneSIDConfig
from .methods import needs_of, options_of
from .parts import OF_CLS


class BehindConnectorConfig(NestsPruneSIDConfig):
    """For families whose tokens are compared as they enter the language model, where `layer` has no meaning."""

    # Why settings that need a CLS token are refused.
    _has_no_cls = "its tokens are compared as they enter the language model, among which is no CLS token"

    def check_settings(self) -> None:
        super().check_settings()
        settings, reason = self.prunesid_config, self._has_no_cls
        missing = OF_CLS & needs_of(settings)
        if missing:
            raise ValueError(
                f"prunesid_config.method={settings.method!r} needs {' and '.join(sorted(missing))} of a vision tower "
                f"with a CLS token, which this model has not: {reason}. Set method_settings={{'score': 'component'}} "
                "(or 'attention', that of all tokens) if the method has them, or method='paper'."
            )
        if options_of(settings).get("keep_cls"):
            raise ValueError(
                f"prunesid_config.method_settings has keep_cls=True, but this model has no CLS token to keep: {reason}"
                ". Set it to False."
            )
