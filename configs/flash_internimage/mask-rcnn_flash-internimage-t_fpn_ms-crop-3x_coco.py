_base_ = [
    "../_base_/models/mask-rcnn_flash-internimage_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/layer-decay_3x.py",
    "../_base_/coco_runtime.py",
]
# 64 images in a batch, at the learning rate of 16.
auto_scale_lr = dict(base_batch_size=64)
