_base_ = [
    "../_base_/models/mask-rcnn_internimage_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/layer-decay_3x.py",
    "../_base_/coco_runtime.py",
]
