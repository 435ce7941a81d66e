_base_ = "./faster-rcnn_r101-dconv-c5-dpool_dc5_16e-600px_coco.py"
model = dict(
    backbone=dict(depth=50, init_cfg=dict(checkpoint="open-mmlab://detectron2/resnet50_caffe"))
)
