# The same with the mask branch of Mask R-CNN, which reads the same map.
_base_ = "./faster-rcnn_r50-dc5.py"
model = dict(
    type="MaskRCNN",
    data_preprocessor=dict(pad_mask=True, mask_pad_value=0),
    roi_head=dict(
        mask_roi_extractor=dict(
            type="mmdeform.SingleRoIExtractor",
            in_indices=(1,),
            roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=2),
            out_channels=256,
            featmap_strides=[16],
        ),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=4,
            in_channels=256,
            conv_out_channels=256,
            num_classes=80,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(rcnn=dict(mask_size=28)),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)
