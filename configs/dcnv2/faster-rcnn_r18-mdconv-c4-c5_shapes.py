# mmdet's ResNet-18 refuses `dcn`: convolutions of the plain detector are replaced instead.
_base_ = "./faster-rcnn_r18_shapes.py"
model = dict(
    type="mmdeform.Transplant",
    model="FasterRCNN",
    rules=[dict(select="backbone.layer[34].*.conv2", type="mmdeform.DCNv2", deform_groups=1)],
)
