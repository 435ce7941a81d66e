_base_ = "../internimage/mask-rcnn_internimage-t_shapes.py"
model = dict(backbone=dict(type="mmdeform.FlashInternImage"))
