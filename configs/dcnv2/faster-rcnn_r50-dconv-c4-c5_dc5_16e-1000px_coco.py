_base_ = "./faster-rcnn_r50-dconv-c5_dc5_16e-1000px_coco.py"
model = dict(backbone=dict(stage_with_dcn=(False, False, True, True)))
