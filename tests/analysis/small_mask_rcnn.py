"""A small Mask R-CNN with mmcv's deformable convolutions, and what its heads compute for a box."""

CHANNELS, WIDTH, CLASSES = 8, 16, 3
RCNN = dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5)
ROI_LAYER = dict(type="RoIAlign", output_size=7, sampling_ratio=2)
EXTRACTOR = dict(
    type="SingleRoIExtractor", roi_layer=ROI_LAYER, out_channels=CHANNELS, featmap_strides=[4, 8]
)
MASK_RCNN = dict(
    type="MaskRCNN",
    data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
    backbone=dict(
        type="ResNet", depth=50, base_channels=8, stem_channels=8, num_stages=2, frozen_stages=1,
        strides=(1, 2), dilations=(1, 1), out_indices=(0, 1),
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True),
    ),
    neck=dict(type="FPN", in_channels=[32, 64], out_channels=CHANNELS, num_outs=2),
    rpn_head=dict(
        type="RPNHead", in_channels=CHANNELS, feat_channels=CHANNELS,
        anchor_generator=dict(
            type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8]
        ),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=EXTRACTOR,
        bbox_head=dict(
            type="Shared2FCBBoxHead", in_channels=CHANNELS, fc_out_channels=WIDTH,
            roi_feat_size=7, num_classes=CLASSES,
        ),
        mask_roi_extractor=EXTRACTOR,
        mask_head=dict(
            type="FCNMaskHead", num_convs=1, in_channels=CHANNELS,
            conv_out_channels=CHANNELS, num_classes=CLASSES,
        ),
    ),
    train_cfg=None,
    test_cfg=dict(
        rpn=dict(
            nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0
        ),
        rcnn=dict(mask_thr_binary=0.5, **RCNN),
    ),
)  # fmt: skip
# Multiply-adds of the box head for a box, and of the mask head for a mask.
PER_BOX = CHANNELS * 49 * WIDTH + WIDTH * WIDTH + WIDTH * (CLASSES + 1) + WIDTH * 4 * CLASSES
PER_MASK = CHANNELS * (49 * CHANNELS * 9 + 49 * CHANNELS * 4 + 14 * 14 * CLASSES)
