# Offsets and modulation from one branch, as in the paper, in place of mmcv's two.
_base_ = "./faster-rcnn_r50-mdpool_shapes.py"
model = dict(roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(head="paper"))))
