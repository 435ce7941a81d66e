_base_ = "./mask-rcnn_dat-t-v1_shapes.py"
# Eight blocks instead of 26.
model = dict(backbone=dict(version="pp", stage_specs=("ND", "ND", "NDND", "DD")))
