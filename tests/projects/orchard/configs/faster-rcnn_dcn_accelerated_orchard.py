"""The same with the one line that gives its deformable layers mmdeform's kernels."""

_base_ = "./faster-rcnn_dcn_orchard.py"
custom_imports = dict(imports=["orchard", "mmdeform.accelerate"])
