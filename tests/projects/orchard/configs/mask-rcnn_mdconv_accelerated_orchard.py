"""The same for scripts that do not import mmdeform themselves, and accelerated."""

_base_ = __import__("mmdeform") and "./mask-rcnn_mdconv_orchard.py"
custom_imports = dict(imports=["orchard", "mmdeform", "mmdeform.accelerate"])
