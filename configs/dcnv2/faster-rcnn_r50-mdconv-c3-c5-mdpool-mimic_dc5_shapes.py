_base_ = "./faster-rcnn_r50-mdconv-c3-c5-mdpool_dc5_shapes.py"
model = dict(
    type="mmdeform.FasterRCNN",
    roi_head=dict(type="mmdeform.MimickingRoIHead", mimicking=dict(num_proposals=8, crop_size=64)),
)
