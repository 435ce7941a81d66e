_base_ = "mmdet::_base_/default_runtime.py"
custom_imports = dict(imports=["mmdeform"], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
    logger=dict(type="LoggerHook", interval=10),
)
randomness = dict(seed=0)
