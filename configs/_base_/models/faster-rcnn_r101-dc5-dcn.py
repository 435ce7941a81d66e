# Faster R-CNN as in the authors' code of Deformable ConvNets v1: fewer channels in the RPN, fewer
# proposals, no hard negatives below an overlap of 0.1.
_base_ = "./faster-rcnn_r50-dc5.py"
model = dict(
    backbone=dict(depth=101, init_cfg=dict(checkpoint="open-mmlab://detectron2/resnet101_caffe")),
    rpn_head=dict(feat_channels=512),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=6000, max_per_img=300),
        rcnn=dict(assigner=dict(neg_iou_thr=(0.1, 0.5)), sampler=dict(num=128)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=6000, max_per_img=300),
        rcnn=dict(score_thr=0.001, nms=dict(iou_threshold=0.3)),
    ),
)
