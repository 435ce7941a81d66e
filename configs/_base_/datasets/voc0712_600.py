# VOC 07+12 with its mirror images, one image per GPU; tested on VOC 07, mAP at IoU 0.5 and 0.7.
_base_ = "mmdet::_base_/datasets/voc0712.py"
train_dataloader = dict(batch_size=1, dataset=dict(times=2))
val_evaluator = dict(iou_thrs=[0.5, 0.7])
test_evaluator = val_evaluator
