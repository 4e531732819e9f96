"""How far scores of a bank merged from ten shards are from those of the whole bank.

    python -m tools.research.merged_bank --sizes=100,400

The features are of crops of photographs, from the network of the detector that comes with the
package, compared by cosines: 8,000 for the bank, 1,000 others to score. Differences are between
scores at the default temperature.
"""

import argparse

import numpy as np


def crops(count, seed, side=32):
    """Return squares of photographs, uint8 `(count, side, side, 3)`."""
    import skimage.data

    photographs = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    generator, found = np.random.default_rng(seed), []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        top, left = (generator.integers(0, length - side) for length in photograph.shape[:2])
        found.append(photograph[top : top + side, left : left + side])
    return np.stack(found)


def main(argv=None):
    """Print one line for each method and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="100,400", help="numbers of centers")
    options = parser.parse_args(argv)

    import sddns_tf
    from sddns_tf.bank import compress, ood_score
    from sddns_tf.beam import BankSketch
    from sddns_tf.features import FeatureExtractor, extract_features

    extractor = FeatureExtractor(sddns_tf.pretrained().extractor.backbone, image_size=32)
    features, probes = (
        extract_features(extractor, crops(count, seed), verbose=0)
        for count, seed in ((8_000, 0), (1_000, 1))
    )
    whole = ood_score(probes, features).numpy()
    print(f"scores of the whole bank: {whole.min():.2f} to {whole.max():.2f}")
    for size in map(int, options.sizes.split(",")):
        for method in ("kmeans", "kcenter"):
            sketch = BankSketch(size, method)
            for shard in np.split(features, 10):
                other = BankSketch(size, method)
                other.add(shard)
                sketch.merge(other)
            merged = sketch.bank()
            centers, weights = compress(features, size, method)
            found = {
                "merged": ood_score(probes, merged.features, weights=merged.weights).numpy(),
                "at once": ood_score(probes, centers, weights=weights).numpy(),
            }
            for name, scores in found.items():
                difference = np.abs(scores - whole)
                print(
                    f"{size} centers, {method}, {name}: mean {difference.mean():.3f}, "
                    f"largest {difference.max():.3f}, "
                    f"correlation {np.corrcoef(scores, whole)[0, 1]:.4f}"
                )
            print(f"{size} centers, {method}, bound: {merged.score_error():.1f}", flush=True)


if __name__ == "__main__":
    main()
