"""The parts of a detector: checked features, a bank of places, separate calibration images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from sddns_tf.aligned import PlaceMoments
from sddns_tf.bank import METHODS, Reservoir, coreset, ood_score
from sddns_tf.components import check_reducible
from sddns_tf.features import image_size_of, stream_features
from sddns_tf.local import Moments
from sddns_tf.networks import is_standardized
from sddns_tf.types import Array
from sddns_tf.validation import check_choice, check_int, check_number

# Features this near are those of one image: its batch moves them by less.
_SHARED_DISTANCE = 1e-4
_SIGNATURE_DIM = 16
_MOST_SIGNATURES = 100_000
# The coreset chooses among this many random places per row of the bank.
_PLACES_FOR_A_ROW = 20
PLACES_BANK_SIZE = 5000


def check_options(
    local: bool,
    *,
    aligned: bool = False,
    components: int | None = None,
    ignore: Any = None,
    temperature: float = 0.04,
    offset: float = 0.1,
    k: int | None = None,
    smoothing: int = 1,
    bank_size: int | None = None,
    bank_method: str = "kmeans",
    auxiliary_weight: float = 0.0,
) -> None:
    """Check options of a detector: everything that can be told without images.

    Args:
        local: Whether places are compared.
        aligned: See `Detector.from_images`, as for all others.
        components: Int or None.
        ignore: The mask; only whether there is one is checked.
        temperature: Number.
        offset: Number.
        k: Int or None.
        smoothing: Int.
        bank_size: Int or None.
        bank_method: String.
        auxiliary_weight: Number.

    Raises:
        ValueError: If one is out of range, or two do not fit together.
    """
    check_number("temperature", temperature, above=0.0)
    check_number("offset", offset)
    check_int("smoothing", smoothing)
    check_choice("bank_method", bank_method, METHODS)
    check_number("auxiliary_weight", auxiliary_weight, 0.0)
    for name, value in (("k", k), ("bank_size", bank_size), ("components", components)):
        if value is not None:
            check_int(name, value)
    if smoothing % 2 == 0:
        raise ValueError(f"`smoothing` must be odd. Received: {smoothing}")
    if smoothing > 1 and not local:
        raise ValueError(
            "`smoothing` averages over places, and this detector compares whole images: pass "
            f"`layers` as well. Received: smoothing={smoothing} without layers"
        )
    if ignore is not None and not local:
        raise ValueError(
            "`ignore` names places, and this detector compares whole images: pass `layers` as "
            "well. Received: ignore without layers"
        )
    check_reducible(components, local, aligned)
    if aligned and (bank_size is not None or k not in (None, 1)):
        raise ValueError(
            "With `aligned=True` the bank has one row, the mean of each place: leave out "
            f"`bank_size` and `k`. Received: bank_size={bank_size}, k={k}"
        )
    if auxiliary_weight and local:
        raise ValueError(
            "`auxiliary_weight` weighs a comparison of whole images, and this detector compares "
            f"places: leave out one of it and `layers`. Received: {auxiliary_weight=}"
        )


def check_rate_and_seed(false_positive_rate: float, seed: int) -> None:
    """Raise a `ValueError` for a rate or a seed that would fail after all images were seen."""
    check_number("false_positive_rate", false_positive_rate, above=0.0, below=1.0)
    check_int("seed", seed, 0, 2**32 - 1)


def check_auxiliary(auxiliary: Any, weight: float) -> None:
    """Raise a `ValueError` unless there are auxiliary images if and only if they have a weight."""
    if bool(weight) != (auxiliary is not None):
        given = "none" if auxiliary is None else "some"
        raise ValueError(
            "Auxiliary images and a positive `auxiliary_weight`, such as 4, go together. "
            f"Received: auxiliary_weight={weight} and {given} of the images"
        )


def check_backbone(backbone: Any, local: bool, standardize: bool | None) -> None:
    """Raise a `ValueError` for a backbone without weights; warn of standardized features."""
    if isinstance(backbone, keras.Model) and not backbone.built:
        raise ValueError(
            f"The backbone has no weights yet: train or build it. Received: {backbone}."
        )
    if standardize is None and not local and is_standardized(backbone):
        warnings.warn(
            "This backbone was trained on standardized features, and these hardly tell images "
            "apart if compared as they are: pass `standardize=model.standardizes_features`. "
            "Received: standardize=None, which compares them as they are",
            stacklevel=3,
        )


def resolution_for(
    bank_images: Any, resolution: int | tuple[int, int] | None
) -> int | tuple[int, int]:
    """Return the resolution that was asked for, else the size of the bank images."""
    found = image_size_of(bank_images) if resolution is None else resolution
    if found is None:
        raise ValueError(
            "`resolution` is needed where the size of the bank images is not known or not one: "
            "the resolution in pixels to which every image is resized first. "
            f"Received: bank_images={bank_images}, resolution=None."
        )
    return found


def bank_of_places(
    extractor: Any,
    images: Any,
    counted: np.ndarray,
    size: int,
    seed: int = 0,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows for a bank of places, from a stream of images, in bounded memory.

    Among all places that count, twenty for each row of the bank are drawn at random, and their
    coreset is the bank. On the way, the mean and standard deviation of all places that count are
    measured, and the extractor is standardized by them, in place. If it reduces channels, their
    principal components are those of the places that were drawn.

    Args:
        extractor: `FeatureExtractor` with layers, not yet standardized.
        images: In-distribution images, as for `extract_features`.
        counted: Bool `(h, w)`, the places that count.
        size: Largest number of rows.
        seed: Int, for the draw and the coreset.
        **options: `batch_size` and `verbose` of `stream_features`.

    Returns:
        Features of places as the extractor then gives them, float32 `(at most size, C)`, and the
        signatures of the first images: see `signatures`.
    """
    plain = with_plain_maps(extractor)
    moments, means, count = Moments(plain.feature_dim), [], 0
    reservoir = Reservoir(_PLACES_FOR_A_ROW * size, seed)
    for maps in stream_features(plain, images, **options):
        places = maps.reshape(-1, maps.shape[-1]) if counted.all() else maps[:, counted]
        places = places.reshape(-1, maps.shape[-1])
        check_finite(places, "bank", "places")
        moments.add(places)
        reservoir.offer(places)
        if count < _MOST_SIGNATURES:
            means.append(maps.mean(axis=(1, 2)))
        count += len(maps)
    extractor.standardize(moments.mean, moments.deviation)

    def standardized(rows):
        return (rows - moments.mean.astype(np.float32)) / moments.deviation.astype(np.float32)

    rows, averages = standardized(reservoir.rows), standardized(np.concatenate(means))
    chosen = coreset(rows, size, seed)
    if extractor.principal is not None:
        extractor.principal.assign(rows)
        # Chosen by all channels: with the reduced ones, banks of solar cells ranked 0.003 worse.
        chosen, averages = (extractor.principal(one).numpy() for one in (chosen, averages))
    return chosen, signatures(extractor, averages[:, np.newaxis, np.newaxis])


def with_plain_maps(extractor: Any) -> Any:
    """Return an extractor with the same backbone, whose maps are neither whitened nor reduced."""
    if not extractor.aligned and extractor.principal is None:
        return extractor
    config = {**extractor.get_config(), "aligned": False, "components": None}
    return type(extractor)(**{**config, "backbone": extractor.backbone})


def align(extractor: Any, images: Any, **options: Any) -> np.ndarray:
    """Align an extractor, in place, to a stream of images in bounded memory.

    Args:
        extractor: `FeatureExtractor` with `aligned=True`.
        images: In-distribution images, as for `extract_features`.
        **options: `batch_size` and `verbose` of `stream_features`.

    Returns:
        Signatures of the images: see `signatures`.
    """
    moments, found = PlaceMoments(extractor.map_size, extractor.feature_dim), []
    for maps in stream_features(with_plain_maps(extractor), images, **options):
        check_finite(maps.reshape(-1, maps.shape[-1]), "bank", "places")
        moments.add(maps)
        found.append(signatures(extractor, maps))
    extractor.whitening.assign(moments.mean(), moments.matrices())
    return np.concatenate(found)


def signatures(extractor: Any, maps: np.ndarray) -> np.ndarray:
    """Return a few numbers for each map `(N, h, w, C)`, `(N, D)`, which tell images apart."""
    if extractor.principal is not None:  # whose last channel is a length: no mean of others
        maps = maps[..., :-1]
    places = maps.mean(axis=(1, 2))
    directions = np.random.default_rng(0).normal(size=(places.shape[1], _SIGNATURE_DIM))
    return places @ directions.astype(np.float32)


def moments_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation of each channel, float32 `(D,)`."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.mean.astype(np.float32), moments.deviation.astype(np.float32)


def scores_against(
    bank: np.ndarray, others: Iterable[np.ndarray], standardize: bool
) -> list[np.ndarray]:
    """Score features of whole images as a detector with its default settings does.

    Args:
        bank: L2-normalized features of the bank's images, `(M, D)`.
        others: List of such features of other images, `(N, D)`.
        standardize: Whether all are standardized by the bank first.

    Returns:
        List of NumPy arrays `(N,)`.
    """
    metric = "cosine"
    if standardize:
        metric, (mean, deviation) = "euclidean", moments_of(bank)
        bank, *others = ((features - mean) / deviation for features in (bank, *others))
    return [ood_score(features, bank, metric=metric).numpy() for features in others]


def checked_features(
    name: str, features: Array, extractor: Any, is_map: bool = False
) -> np.ndarray:
    """Return features as a finite float32 array, of the shape that an extractor gives.

    Args:
        name: Name of the argument.
        features: What was passed for it.
        extractor: `FeatureExtractor` that gave them.
        is_map: Whether they are whole maps `(N, h, w, C)`.

    Returns:
        NumPy float32 array.

    Raises:
        ValueError: If shapes do not fit, or features are not finite or not of norm 1 where they
            should be.
    """
    features = np.asarray(features, np.float32)
    local = extractor.map_size is not None
    shape = (*(extractor.map_size if is_map else ()), extractor.feature_dim)
    if features.shape[1:] != shape or not len(features):
        raise ValueError(
            f"`{name}` must have shape (N, {', '.join(map(str, shape))}) with N at least 1, as the "
            f"extractor gives them. Received: shape={features.shape}"
        )
    kind = "images" if is_map or not local else "places"
    check_finite(features.reshape(len(features), -1), name.removesuffix("_features"), kind)
    lengths = np.linalg.norm(features, axis=-1)
    if not extractor.standardized and (empty := np.count_nonzero(lengths == 0.0)):
        raise ValueError(
            "Cosines need features that are not all 0, as a network with ReLU may give for a black "
            f"image. Leave such images out. Received: {empty} of {len(features)} rows of `{name}` "
            "are 0"
        )
    if not extractor.standardized and np.abs(lengths - 1.0).max() > 0.01:
        raise ValueError(
            f"`{name}` must be L2-normalized, as `extract_features` gives them. Received: rows of "
            f"length {lengths.min():.3g} to {lengths.max():.3g}"
        )
    return features


def checked_weights(weights: Array, rows: int) -> np.ndarray:
    """Return weights of the rows of a bank as a float32 array."""
    weights = np.asarray(weights, np.float32)
    if weights.shape != (rows,) or not ((weights > 0) & np.isfinite(weights)).all():
        raise ValueError(
            f"`bank_weights` must be {rows} positive numbers. Received: "
            f"shape={weights.shape}, from {weights.min(initial=np.inf):.3g} to "
            f"{weights.max(initial=-np.inf):.3g}"
        )
    return weights


def check_finite(features: np.ndarray, name: str, kind: str = "images") -> None:
    """Raise a `ValueError` unless all features `(N, D)` are finite."""
    bad = len(features) - np.count_nonzero(np.isfinite(features).all(axis=1))
    if bad:
        raise ValueError(
            f"The backbone gives features that are not finite for {bad} of {len(features)} "
            f"{name} {kind}. Are its weights and these images finite?"
        )


def warn_of_shared_images(count: int, total: int) -> None:
    """Warn of calibration images in the bank: they look more normal than any new image will."""
    if count:
        warnings.warn(
            f"{count} of the {total} calibration images are in the bank as well. Their scores are "
            "too low, so that more normal images than the false positive rate will be flagged. "
            "Hold calibration images out of the bank.",
            stacklevel=4,
        )


def count_shared(bank_features: np.ndarray, calibration_features: np.ndarray) -> int:
    """Count the calibration features that are in the bank, up to rounding.

    The last bits of an image's features depend on its batch, so comparing bytes is no use. Equal
    rows are close along any direction, so each is compared with its neighbors along one.
    """
    dim = bank_features.shape[1]
    direction = np.asarray(np.random.default_rng(0).normal(size=dim), np.float32)
    places = bank_features @ direction
    order = np.argsort(places)
    places, wanted = places[order], calibration_features @ direction
    # Standardized features are longer than 1.
    distance = _SHARED_DISTANCE * np.linalg.norm(bank_features, axis=1).mean()
    reach = distance * np.linalg.norm(direction)
    first = np.searchsorted(places, wanted - reach)
    last = np.searchsorted(places, wanted + reach)
    shared = 0
    for row, start, stop in zip(calibration_features, first, last, strict=True):
        near = bank_features[order[start:stop]]
        shared += bool((np.linalg.norm(near - row, axis=1) <= distance).any())
    return shared
