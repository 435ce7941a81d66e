_base_ = "./faster-rcnn_r50-mdconv-c3-c5-mdpool_dc5_16e-1000px_coco.py"
model = dict(type="mmdeform.FasterRCNN", roi_head=dict(type="mmdeform.MimickingRoIHead"))
