"""A small vision transformer on CIFAR-10 for two CPU cores.

python tools/train.py --recipe=cpu_small --data_dir=TFDS --output_dir=cifar10
"""

RECIPE = {
    "data": "tfds:cifar10",
    "auxiliary": "tfds:imagenet_resized/32x32",
    "shift": "rot90",
    "source": "auxiliary",
    "backbone": "vit_tiny",
    "patch_size": 4,
    "hidden_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "local_views": 2,
    "local_area": [0.15, 0.4],
    "num_prototypes": 1024,
    "head_hidden_dim": 512,
    "bottleneck_dim": 128,
    "norm_last_layer": False,
    "teacher_temperature": [0.02],
    "teacher_momentum": [0.99, 1.0],
    "learning_rate": 0.005,
    "warmup_epochs": 0.2,
    "batch_size": 96,
    "epochs": 4,
}
