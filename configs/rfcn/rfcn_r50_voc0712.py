_base_ = [
    "../_base_/models/rfcn_r50-caffe.py",
    "../_base_/datasets/voc0712_600.py",
    "../_base_/schedules/sgd_7e_voc0712.py",
    "../_base_/coco_runtime.py",
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=20)))
