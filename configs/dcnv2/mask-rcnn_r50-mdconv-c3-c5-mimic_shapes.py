# Feature mimicking with a pyramid: crops are pooled from the level that suits their size.
_base_ = "./mask-rcnn_r50-mdconv-c3-c5_shapes.py"
model = dict(
    type="mmdeform.MaskRCNN",
    roi_head=dict(type="mmdeform.MimickingRoIHead", mimicking=dict(num_proposals=8, crop_size=64)),
)
