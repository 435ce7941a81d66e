_base_ = "./mask-rcnn_r50-mdconv-c3-c5_shapes.py"
model = dict(backbone=dict(dcn=dict(deform_groups=4)))
