_base_ = "../{{$DAT_BASE:mask-rcnn_dat-t-v1_fpn_ms-crop-1x_coco}}.py"
model = dict(backbone=dict(use_offsets=False, position_bias=None))
