_base_ = "./faster-rcnn_r101-dconv-c5-dpool_dc5_14e-600px_voc0712.py"
model = dict(
    backbone=dict(depth=50, init_cfg=dict(checkpoint="open-mmlab://detectron2/resnet50_caffe"))
)
