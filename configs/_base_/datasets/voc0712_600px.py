# mmdet's, with shorter sides of 600 pixels and 11-point AP; each image once in an epoch, and AP at
# both overlaps of the deformable papers.
_base_ = "mmdet::_base_/datasets/voc0712.py"
train_dataloader = dict(batch_size=1, dataset=dict(times=1))
val_evaluator = dict(iou_thrs=[0.5, 0.7])
test_evaluator = val_evaluator
