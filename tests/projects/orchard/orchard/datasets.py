from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS


@DATASETS.register_module()
class OrchardDataset(CocoDataset):
    METAINFO = dict(classes=("apple", "plum"), palette=[(213, 94, 0), (86, 180, 233)])  # noqa: RUF012
