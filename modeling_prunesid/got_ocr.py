"""What GOT-OCR 2.0 and the models of its class share."""

from .tiles import TiledModelMixin


class GotOcrModelMixin(TiledModelMixin):
    """For pages or tiles whose patches a convolution merges, 16 to a token."""

    views_apart = ()
    pools_tensor = ("image",)

    def patches_per_token(self):
        return 16
