"""The authors' recipe for CIFAR-10: ViT-S/16 on images enlarged to 256 px, 500 epochs.

    python tools/train.py --recipe=paper_cifar10 --data_dir=TFDS --output_dir=cifar10

Days on one GPU; not run here, so that there is no result of ours to state.

Reference: Rafiee et al., arXiv 2201.06378, and the authors' released program.
"""

RECIPE = {
    "data": "tfds:cifar10",
    "auxiliary": "tfds:imagenet_resized/32x32",
    "shift": "rot90",
    "source": "auxiliary",
    "backbone": "vit_small",
    "image_size": 256,
    "patch_size": 16,
    "drop_path_rate": 0.1,
    "local_views": 8,
    "local_area": [0.15, 0.4],
    "num_prototypes": 4096,
    "head_hidden_dim": 2048,
    "bottleneck_dim": 256,
    "norm_last_layer": False,
    "teacher_temperature": [0.04, 0.01],
    "teacher_momentum": [0.996, 1.0],
    "learning_rate": 0.004,
    "final_learning_rate": 1e-6,
    "warmup_epochs": 30,
    "weight_decay": [0.04, 0.4],
    "gradient_clip_norm": 3.0,
    "frozen_last_layer_epochs": 1,
    "batch_size": 128,
    "epochs": 500,
    "precision": "float32",
}
