"""A trained backbone, its bank and its calibration as one model that scores and flags images.

Longer than other modules because it is one class with its reference: much of it is docstrings. The
parts of a detector are in `building`, `features`, `bank` and `calibration`.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import building, files, image_ops, second_voice
from sddns_tf.bank import compress, coreset, ood_score
from sddns_tf.calibration import ending_at, largest_flagged_rank, merged, rounding, snapped
from sddns_tf.features import (
    FeatureExtractor,
    extract_features,
    images_per_step,
    stream_features,
)
from sddns_tf.image_sources import batches_of, image_source
from sddns_tf.local import counted_places, smoothed
from sddns_tf.metrics import as_scores
from sddns_tf.types import Array
from sddns_tf.validation import check_int, image_array

# Rows of the bank that all places of a batch are compared with at once.
_BLOCK_OF_PLACES = 256

_TRAINED = pathlib.Path(__file__).parent / "trained"
PRETRAINED = ("cifar10-small",)


@keras.saving.register_keras_serializable("sddns_tf")
class Detector(keras.Model):
    """Flags out-of-distribution images at a chosen false positive rate.

    Make one with `Detector.from_images`. The constructor is for loading saved detectors: it makes a
    detector with an empty bank, which flags everything.

    The p-value of an image is conformal: with N calibration images,
    `p_value = (1 + #{calibration scores >= score}) / (1 + N)` and `is_ood = p_value <=
    false_positive_rate`. Of normal images that are exchangeable with the calibration images (and in
    neither the training set nor the bank), at most that share is flagged, on average over
    calibration sets. No p-value is below `1 / (N + 1)`, so a rate of 0.001 takes 999 images.

    A NaN score (from features that are not finite) counts as higher than every calibration score:
    the p-value is the lowest possible and the image is flagged.

    A local detector, whose extractor gives feature maps, compares each place of an image with the
    places in the bank. An image's score is the highest score of its places, in calibration as well.
    So `is_ood` means that some place of the map is above `threshold`, and at most the promised
    share of normal images has any such place. With an aligned extractor each place is compared with
    the same place of other images: the bank has one row, the mean, and the distance from it is the
    place's Mahalanobis distance.

    Args:
        extractor: `FeatureExtractor` of the detector.
        bank_size: Number of rows of the bank.
        calibration_size: Number of calibration images.
        temperature: Positive float, of the score: see `bank.ood_score`.
        offset: Float, subtracted from cosines in the score.
        k: None, or the number of nearest rows of the bank that the score averages over.
        smoothing: Odd int. A local detector's place scores the mean over a square of so many
            places on a side; 1 leaves each by itself.
        auxiliary_weight: Weight of the second voice: see `from_images`. 0: there is none.

    Call arguments:
        images: uint8 or float in 0-255, `(B, H, W, 3)`, of any height and width.

    Returns:
        Dict of `"ood_score"`, float32 `(B,)`, higher means more out-of-distribution;
        `"p_value"`, float32 `(B,)`; `"is_ood"`, bool `(B,)`; for a local detector also
        `"anomaly_map"`, float32 `(B, h, w)`, the score of each place, whose maximum is the image's:
        `is_ood == (anomaly_map > threshold).any()`.

    References:
        Rafiee et al., arXiv 2201.06378 (the score); Bates et al., "Testing for outliers with
        conformal p-values", arXiv 2104.08279; Roth et al., "Towards Total Recall in Industrial
        Anomaly Detection", CVPR 2022 (nearest places).

    Example:
    >>> detector = Detector.from_images(
    ...     model.teacher_backbone,
    ...     bank_images=train_images,
    ...     calibration_images=held_out_images,
    ...     standardize=model.standardizes_features,
    ... )
    >>> detector.predict(images)["is_ood"]
    array([False,  True])
    >>> detector.save("parts.keras")
    """

    def __init__(
        self,
        extractor: Any,
        bank_size: int,
        calibration_size: int,
        *,
        temperature: float = 0.04,
        offset: float = 0.1,
        k: int | None = None,
        smoothing: int = 1,
        auxiliary_weight: float = 0.0,
        **kwargs,
    ) -> None:
        # Not trained itself. The extractor, which may be of a model in training, stays as it is.
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False, "trainable": False})
        check_int("bank_size", bank_size)
        check_int("calibration_size", calibration_size)
        building.check_options(
            extractor.map_size is not None,
            temperature=temperature,
            offset=offset,
            k=k,
            smoothing=smoothing,
            auxiliary_weight=auxiliary_weight,
        )
        self.extractor = extractor
        self.temperature = float(temperature)
        self.offset = float(offset)
        self.k = k
        self.smoothing = smoothing
        self.auxiliary_weight = float(auxiliary_weight)
        if self.is_local:
            self.counted = self._add_state("counted", extractor.map_size, 1.0)
        if self.auxiliary_weight:
            self.auxiliary_direction = self._add_state(
                "auxiliary_direction", (extractor.feature_dim,)
            )
            self.auxiliary_bias = self._add_state("auxiliary_bias", (), -math.inf)
        self._make_state(bank_size, calibration_size)
        self.built = True

    def _make_state(self, bank_size, calibration_size):
        """Create the variables of the bank and the calibration, replacing any that exist."""
        if hasattr(self, "bank"):
            del self.bank, self.bank_weights, self.rate, self.largest_flagged_rank
            del self.calibration_scores
        self.bank = self._add_state("bank", (bank_size, self.extractor.feature_dim))
        self.bank_weights = self._add_state("bank_weights", (bank_size,), 1.0 / bank_size)
        self.rate = self._add_state("false_positive_rate", (), 1.0)
        self.largest_flagged_rank = self._add_state("largest_flagged_rank", (), calibration_size)
        # Last, because it is made again when the number of calibration images changes, and weights
        # are saved in the order they were made.
        self.calibration_scores = self._add_calibration_scores(calibration_size)

    def _add_state(self, name, shape, value=0.0):
        return self.add_weight(
            shape=shape,
            initializer=keras.initializers.Constant(value),
            dtype="float32",
            trainable=False,
            autocast=False,
            name=name,
        )

    def _add_calibration_scores(self, size):
        return self._add_state("calibration_scores", (size,), -math.inf)

    @classmethod
    def from_images(
        cls,
        backbone: keras.Model,
        bank_images: Any,
        calibration_images: Any,
        false_positive_rate: float = 0.05,
        *,
        image_size: int | tuple[int, int] | None = None,
        resolution: int | tuple[int, int] | None = None,
        layers: Any = None,
        aligned: bool = False,
        components: int | None = None,
        standardize: bool | None = None,
        ignore: Any = None,
        auxiliary_images: Any = None,
        auxiliary_weight: float = 0.0,
        resize: str = "squash",
        mean: Sequence[float] = image_ops.IMAGENET_MEAN,
        std: Sequence[float] = image_ops.IMAGENET_STD,
        temperature: float = 0.04,
        offset: float = 0.1,
        k: int | None = None,
        smoothing: int = 1,
        bank_size: int | None = None,
        bank_method: str = "kmeans",
        batch_size: int | None = None,
        seed: int = 0,
        verbose: int | str = "auto",
    ) -> Detector:
        """Return a calibrated detector from a trained backbone and in-distribution images.

        The backbone is copied: training it further does not change the detector.

        Args:
            backbone: Keras model from normalized float images `(B, h, w, 3)` to features
                `(B, D)`, such as `SelfDistillation.teacher_backbone`.
            bank_images: In-distribution images, usually the training set: uint8 or float in 0-255,
                `(M, H, W, 3)`, or a dataset of batches of such images.
            calibration_images: In-distribution images that are neither trained on nor in the bank,
                in the same form. At least `1 / false_positive_rate - 1` of them.
            false_positive_rate: Largest share of normal images to flag, between 0 and 1.
            image_size: Size of the backbone's input in pixels, an int or (height, width).
                Defaults to the size that the backbone was made for, else to `resolution`.
            resolution: Native resolution of in-distribution images in pixels, to which every image
                is resized first, an int or (height, width). Defaults to the size of the bank
                images.
            layers: None, or the layers of the backbone whose maps are compared place by place:
                names, `"auto"` or `"tokens"`, see `FeatureExtractor`. The detector is then a local
                one, and its answers include an `anomaly_map`.
            aligned: Whether the same part of an object is in the same place of every image, as
                where a fixture holds it before a fixed camera. Each place is then compared with
                this place of the bank's images alone, by its mean and covariance: fewer images are
                needed, and scoring takes less time. With `layers` of few channels: each place has
                a matrix of the channels' number squared.
            components: None, or how many channels places are reduced to: their principal components
                over the bank and the length of the rest: see `components.PrincipalComponents`. The
                bank is smaller and scoring faster in proportion, and fine damage may rank worse.
                Not if aligned.
            standardize: Whether each channel of the L2-normalized features is standardized by its
                mean and deviation over the bank, and distances are compared in place of cosines,
                as for places. Pass `model.standardizes_features` of the `SelfDistillation`: where
                it standardizes features when it trains, they hardly tell images apart if compared
                as they are. `False` is the paper's score, and so is `None`, but with a warning for
                such a teacher. Maps of `layers` always are standardized.
            ignore: None, or the places that a local detector leaves out of the bank and the scores,
                such as a serial number: a bool mask `(h, w)` of the map or of the image, or the
                path of an image file that is not black there. The promise then applies to the rest.
            auxiliary_images: None, or images of other things, such as those that negatives were
                made of, in the form of the bank images, for the second voice.
            auxiliary_weight: Weight of the second voice, an addition to the paper's score: 0 for
                none; 4 was best on the development sets of CIFAR-10. A logistic regression of the
                bank's features against those of auxiliary images gives the probability `p` that an
                image is none of the latter, and `-auxiliary_weight * log(p)` is added to its score.
                Not with `layers`.
            resize: How an image of another shape is brought to the resolution: `"squash"` changes
                its aspect ratio, `"crop"` cuts its sides off.
            mean: Three floats, mean of each channel for images scaled to 0-1.
            std: Three floats, standard deviation of each channel for images scaled to 0-1.
            temperature: Positive float, of the score: see `bank.ood_score`.
            offset: Float, subtracted from cosines in the score.
            k: None, or the number of nearest rows of the bank that the score averages over. For
                places, None means 1.
            smoothing: Odd int. A local detector's place scores the mean over a square of so many
                places on a side; 1, the default, leaves each by itself. 3 suits damage that is
                larger than a place, and images whose texture is irregular.
            bank_size: None keeps the features of all bank images; an int keeps at most that many
                centers: see `bank.compress`. For places, the default keeps 5,000, chosen by
                `bank.coreset` from twenty times as many drawn at random.
            bank_method: `"kmeans"` or `"kcenter"`, for features of whole images.
            batch_size: Images per step, 256 by default, 32 with `layers`; a dataset has its own.
            seed: Int, for the compression and the draw of places.
            verbose: 0 is silent, 1 shows progress bars, 2 lines; `"auto"` shows a bar where there
                is more than one step.

        Returns:
            A `Detector`.

        Raises:
            ValueError: If there are too few calibration images for the rate, images have a wrong
                shape or range, the bank images have no single size and `resolution` is not given,
                a layer gives no map, a mask does not fit, or features are not finite.
        """
        # Checked first, so that no computation is wasted.
        score: dict[str, Any] = {
            "temperature": temperature, "offset": offset, "k": k, "smoothing": smoothing
        }  # fmt: skip
        building.check_options(
            layers is not None,
            aligned=aligned,
            components=components,
            ignore=ignore,
            bank_size=bank_size,
            bank_method=bank_method,
            auxiliary_weight=auxiliary_weight,
            **score,
        )
        building.check_rate_and_seed(false_positive_rate, seed)
        building.check_auxiliary(auxiliary_images, auxiliary_weight)
        building.check_backbone(backbone, layers is not None, standardize)
        bank_images = image_source(bank_images, "bank_images")
        calibration_images = image_source(calibration_images, "calibration_images")
        if auxiliary_images is not None:
            auxiliary_images = image_source(auxiliary_images, "auxiliary_images")
        extractor = FeatureExtractor(
            backbone,
            image_size,
            building.resolution_for(bank_images, resolution),
            layers=layers,
            standardized=bool(standardize),
            aligned=aligned,
            components=components,
            resize=resize,
            mean=mean,
            std=std,
        ).snapshot()
        options: dict[str, Any] = {"batch_size": batch_size, "verbose": verbose}
        if layers is None:
            return cls._of_whole_images(
                extractor,
                (bank_images, calibration_images, auxiliary_images),
                options,
                false_positive_rate=false_positive_rate,
                auxiliary_weight=auxiliary_weight,
                bank_size=bank_size,
                bank_method=bank_method,
                seed=seed,
                **score,
            )
        counted = counted_places(ignore, extractor)
        images = (bank_images, calibration_images)
        return cls._of_places(
            extractor, images, false_positive_rate, counted, bank_size, seed, score, options
        )

    @classmethod
    def _of_whole_images(cls, extractor, images, options, **settings):
        """Return a detector that compares whole images; the features of all are held."""
        bank_images, calibration_images, auxiliary_images = images
        # Calibration first: it is the smaller set, and if it is too small, the bank costs nothing.
        calibration = extract_features(
            extractor, calibration_images, name="calibration_images", **options
        )
        largest_flagged_rank(len(calibration), settings["false_positive_rate"])
        bank = extract_features(extractor, bank_images, name="bank_images", **options)
        if extractor.standardized:
            center, deviation = building.moments_of(bank)
            extractor.standardize(center, deviation)
            bank = (bank - center) / deviation
            calibration = (calibration - center) / deviation
        if auxiliary_images is not None:
            settings["auxiliary_features"] = extract_features(
                extractor, auxiliary_images, name="auxiliary_images", **options
            )
        return cls.from_features(extractor, bank, calibration, **settings)

    @classmethod
    def _of_places(cls, extractor, images, rate, counted, bank_size, seed, score, options):
        """Return a local detector; all images are streamed."""
        bank_images, calibration_images = images
        if isinstance(calibration_images, np.ndarray):
            largest_flagged_rank(len(calibration_images), rate)
        if extractor.aligned:
            seen = building.align(extractor, bank_images, **options)
            bank = np.zeros((1, extractor.feature_dim), np.float32)
        else:
            bank, seen = building.bank_of_places(
                extractor,
                bank_images,
                counted,
                building.PLACES_BANK_SIZE if bank_size is None else bank_size,
                seed,
                **options,
            )
        detector = cls(extractor, len(bank), 1, **{**score, "k": score["k"] or 1})
        detector.counted.assign(counted)
        detector.bank.assign(bank)
        known, found = [], []
        plain = building.with_plain_maps(extractor) if extractor.aligned else extractor
        for maps in stream_features(plain, calibration_images, **options):
            known.append(building.signatures(extractor, maps))
            maps = extractor.whitening(maps).numpy() if extractor.aligned else maps
            found.append(detector._scores(maps))
        scores = np.concatenate(found)
        shared = building.count_shared(seen, np.concatenate(known))
        building.warn_of_shared_images(shared, len(scores))
        detector._calibrate(scores, rate)
        return detector

    @classmethod
    def from_features(
        cls,
        extractor: Any,
        bank_features: Array,
        calibration_features: Array,
        false_positive_rate: float = 0.05,
        *,
        bank_weights: Array | None = None,
        auxiliary_features: Array | None = None,
        auxiliary_weight: float = 0.0,
        ignore: Any = None,
        temperature: float = 0.04,
        offset: float = 0.1,
        k: int | None = None,
        smoothing: int = 1,
        bank_size: int | None = None,
        bank_method: str = "kmeans",
        seed: int = 0,
    ) -> Detector:
        """Return a calibrated detector from features extracted beforehand.

        For an extractor with layers, the bank's features are those of places, `(M, C)`, and the
        calibration's are whole maps, `(N, h, w, C)`, both standardized by the bank's mean and
        standard deviation: see `FeatureExtractor.standardize`. With components, both are reduced to
        these. For an aligned extractor, the bank is the mean, zeros `(1, C)`.

        Args:
            extractor: `FeatureExtractor` that gave the features. The detector uses it without
                copying it.
            bank_features: Features of in-distribution images, float `(M, D)`, L2-normalized unless
                the extractor standardizes them.
            calibration_features: The same for images that are neither trained on nor in the bank,
                `(N, D)`.
            false_positive_rate: Largest share of normal images to flag, between 0 and 1.
            bank_weights: Weights `(M,)` of the rows of the bank, or None for equal ones: see
                `bank.compress`.
            auxiliary_features: None, or features of images of other things, `(A, D)`, for the
                second voice.
            auxiliary_weight: Weight of the second voice: see `from_images`.
            ignore: As for `from_images`.
            temperature: Positive float, of the score: see `bank.ood_score`.
            offset: Float, subtracted from cosines in the score.
            k: None, or the number of nearest rows of the bank that the score averages over. For
                places, None means 1.
            smoothing: As for `from_images`.
            bank_size: None keeps the bank; an int compresses it to at most that many centers.
            bank_method: `"kmeans"` or `"kcenter"`, for features of whole images.
            seed: Int, for the compression.

        Returns:
            A `Detector`.

        Raises:
            ValueError: If shapes do not fit, features are not finite, or there are too few
                calibration features for the rate.

        Example:
        >>> extractor = FeatureExtractor(backbone, image_size=32, resolution=32)
        >>> bank_features = extract_features(extractor, train_images)
        >>> detector = Detector.from_features(
        ...     extractor, bank_features, extract_features(extractor, held_out_images), 0.05
        ... )
        """
        local = extractor.map_size is not None
        building.check_options(
            local,
            ignore=ignore,
            temperature=temperature,
            offset=offset,
            k=k,
            smoothing=smoothing,
            bank_size=bank_size,
            bank_method=bank_method,
            auxiliary_weight=auxiliary_weight,
        )
        building.check_rate_and_seed(false_positive_rate, seed)
        building.check_auxiliary(auxiliary_features, auxiliary_weight)
        features = building.checked_features("bank_features", bank_features, extractor)
        calibration = building.checked_features(
            "calibration_features", calibration_features, extractor, is_map=local
        )
        largest_flagged_rank(len(calibration), false_positive_rate)
        weights = np.full(len(features), 1.0 / len(features), np.float32)
        if bank_weights is not None:
            weights = building.checked_weights(bank_weights, len(features))
        voice = None
        if auxiliary_weight:
            others = building.checked_features("auxiliary_features", auxiliary_features, extractor)
            voice = second_voice.fit(features, others, weights)
        if not local:
            shared = building.count_shared(features, calibration)
            building.warn_of_shared_images(shared, len(calibration))
        if bank_size is not None:
            if bank_weights is not None:
                raise ValueError(
                    "A weighted bank is compressed already. "
                    f"Received: bank_size={bank_size} and `bank_weights`"
                )
            features, weights = _compressed(features, bank_size, bank_method, seed, extractor)
        detector = cls(
            extractor,
            bank_size=len(features),
            calibration_size=len(calibration),
            temperature=temperature,
            offset=offset,
            k=1 if local and k is None else k,
            smoothing=smoothing,
            auxiliary_weight=auxiliary_weight,
        )
        if voice is not None:
            detector.auxiliary_direction.assign(voice[0])
            detector.auxiliary_bias.assign(voice[1])
        if local:
            detector.counted.assign(counted_places(ignore, extractor))
        detector.bank.assign(features)
        detector.bank_weights.assign(weights)
        detector._calibrate(detector._scores(calibration), false_positive_rate)
        return detector

    def compressed(self, size: int, method: str = "kmeans", seed: int = 0) -> Detector:
        """Return a detector with the same extractor and a bank of at most `size` rows.

        The calibration scores are still those of the whole bank; a compressed bank gives nearly the
        same scores. Call `recalibrate` with calibration images for exact p-values.

        Args:
            size: Largest number of rows of the bank.
            method: `"kmeans"` or `"kcenter"`: see `bank.compress`. Places are always chosen by
                `bank.coreset`.
            seed: Int, for the compression.

        Returns:
            A `Detector`. It shares the extractor; nothing else.

        Raises:
            ValueError: If the bank is compressed already.

        Example:
        >>> small = detector.compressed(1000)
        >>> small.recalibrate(held_out_images)
        """
        weights = self.bank_weights.numpy()
        if np.ptp(weights) > 1e-6 * weights.max():
            raise ValueError(
                f"The bank is compressed already, to {len(weights)} weighted centers: to export "
                f"it, give a `bank_size` of at least as many. Received: size={size}"
            )
        if self.k is not None and self.k > size:
            raise ValueError(
                f"`size` must be at least k={self.k}, the nearest rows that count. "
                f"Received: size={size}"
            )
        centers, weights = _compressed(self.bank.numpy(), size, method, seed, self.extractor)
        return self._with(centers, weights, self.calibration_scores.numpy())

    def calibrated_on(
        self,
        images: Array,
        false_positive_rate: float | None = None,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
    ) -> Detector:
        """Return a detector with the same bank, calibrated on one group of normal images.

        Where groups differ (kinds of part, cameras, lines), one calibration for all keeps its
        promise only on average: it may flag more than the rate in one group and fewer in another.
        One detector per group, all with the same bank, keeps the promise for each.

        Args:
            images: In-distribution images of the group that are neither trained on nor in the
                bank, as for `from_images`.
            false_positive_rate: Largest share of normal images to flag, between 0 and 1. None uses
                this detector's.
            batch_size: Images per step; a dataset has its own.
            verbose: As for `recalibrate`.

        Returns:
            A `Detector`. It shares the extractor; nothing else.

        Raises:
            ValueError: If there are too few images for the rate.

        Reference:
            Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005, section
            4.5 (Mondrian conformal predictors).

        Example:
        >>> left = detector.calibrated_on(images_of_the_left_camera)
        """
        scores = self._scores_to_calibrate(images, batch_size, verbose)
        bank, weights = self.bank.numpy(), self.bank_weights.numpy()
        return self._with(bank, weights, scores, false_positive_rate)

    def with_calibration_scores(self, scores: Array) -> Detector:
        """Calibrate a copy of the detector with scores measured elsewhere.

        Use this for an export whose scores differ slightly from the detector's.

        Args:
            scores: Scores of calibration images, float `(N,)`, in any order.

        Returns:
            A `Detector`. It shares the extractor; nothing else.

        Raises:
            ValueError: If they are not finite numbers `(N,)`, or too few for the rate.
        """
        scores = as_scores(scores)
        return self._with(self.bank.numpy(), self.bank_weights.numpy(), scores)

    def _with(self, bank, weights, scores, rate=None):
        config = {**self.get_config(), "extractor": self.extractor}
        other = type(self)(**{**config, "bank_size": len(bank), "calibration_size": len(scores)})
        other.bank.assign(bank)
        other.bank_weights.assign(weights)
        if self.is_local:
            other.counted.assign(self.counted)
        if self.auxiliary_weight:
            other.auxiliary_direction.assign(self.auxiliary_direction)
            other.auxiliary_bias.assign(self.auxiliary_bias)
        other.calibration_scores.assign(merged(scores, self.rounding))
        other._set_rate(self.false_positive_rate if rate is None else rate)
        return other

    def call(self, images: Array) -> dict[str, tf.Tensor]:
        """Map images `(B, H, W, 3)` to a dict of scores, p-values and decisions, each `(B,)`."""
        return self.answer(self.extractor(images))

    def answer(self, features: Array) -> dict[str, tf.Tensor]:
        """Return the detector's answers for images whose features were already extracted.

        Args:
            features: Float32 `(B, D)`, as the extractor gives them; for a local detector, maps
                `(B, h, w, C)`.

        Returns:
            Dict of tensors, as for a call.
        """
        found = self.scores(features)
        score = self._snapped(found["ood_score"])
        # A comparison with NaN is False, so a NaN score has rank 1. (`not (score <= threshold)`
        # would not work: the graph optimizer turns it into `score > threshold`.)
        as_high = self.calibration_scores[tf.newaxis, :] >= score[:, tf.newaxis]
        rank = 1.0 + tf.cast(tf.reduce_sum(tf.cast(as_high, tf.int32), axis=1), tf.float32)
        answers = {
            "ood_score": score,
            "p_value": rank / (1.0 + self.calibration_scores.shape[0]),
            "is_ood": rank <= self.largest_flagged_rank,
        }
        if self.is_local:
            answers["anomaly_map"] = ending_at(found["anomaly_map"], score)
        return answers

    def scores(
        self, features: Array, block_size: int | None = None, smooth: bool = True
    ) -> dict[str, tf.Tensor]:
        """Return scores as measured, before they are snapped to calibration scores.

        Args:
            features: As for `answer`.
            block_size: For a local detector, rows of the bank to compare at once: see
                `bank.ood_score`.
            smooth: Whether places are averaged as the detector's `smoothing` says.

        Returns:
            Dict of `"ood_score"`, float32 `(B,)`, and for a local detector `"anomaly_map"`, float32
            `(B, h, w)`. A place whose features are not finite has an infinite score, an ignored
            place the lowest score possible.
        """
        if not self.is_local:
            return {"ood_score": self._score(features)}
        return self.image_scores(self.place_scores(features, block_size), smooth)

    def place_scores(self, features: Array, block_size: int | None = None) -> tf.Tensor:
        """Return a local detector's scores of places, each by itself and none ignored.

        Args:
            features: Maps `(B, h, w, C)`.
            block_size: As for `scores`.

        Returns:
            Float32 `(B, h, w)`. A place whose features are not finite has an infinite score.
        """
        places = tf.reshape(features, [-1, self.extractor.feature_dim])
        maps = self._score(places, block_size=block_size or _BLOCK_OF_PLACES)
        maps = tf.reshape(maps, [-1, *self.extractor.map_size])
        return tf.where(tf.math.is_nan(maps), math.inf, maps)

    def image_scores(self, maps: Array, smooth: bool = True) -> dict[str, tf.Tensor]:
        """Return a local detector's `scores`, given those of places, each by itself.

        Args:
            maps: Float32 `(B, h, w)`, as `place_scores` returns them.
            smooth: As for `scores`.

        Returns:
            Dict of `"ood_score"` and `"anomaly_map"`, as for `scores`.
        """
        if self.smoothing > 1 and smooth:
            maps = smoothed(maps, self.counted, self.smoothing)
        maps = tf.minimum(maps, tf.where(self.counted > 0.5, math.inf, self.lowest_score))
        return {"ood_score": tf.reduce_max(maps, axis=[1, 2]), "anomaly_map": maps}

    def _score(self, features, **kwargs):
        arguments = (self.bank, self.temperature, self.offset, self.k)
        metric = self.extractor.metric
        score = ood_score(features, *arguments, metric=metric, weights=self.bank_weights, **kwargs)
        if self.auxiliary_weight:
            surprise = second_voice.surprise(
                features, self.auxiliary_direction, self.auxiliary_bias
            )
            score += self.auxiliary_weight * surprise
        return score

    def _snapped(self, score):
        return snapped(score, self.calibration_scores, self.rounding)

    def predict(
        self,
        x: Array,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: Any = None,
        callbacks: Any = None,
    ) -> dict[str, np.ndarray]:
        """`keras.Model.predict`: NumPy arrays for a whole set of images.

        Args:
            x: Images `(N, H, W, 3)`, uint8 or float in 0-255, a list of images of one size, or
                batches of images: a `tf.data.Dataset`, a generator or a `keras.utils.PyDataset`.
            batch_size: Positive int, images per step, 32 by default; a dataset has its own.
            verbose: As in Keras.
            steps: As in Keras.
            callbacks: As in Keras.

        Returns:
            Dict of `"ood_score"`, `"p_value"` and `"is_ood"`, NumPy arrays `(N,)`, and for a local
            detector `"anomaly_map"`, `(N, h, w)`.

        Raises:
            ValueError: If `x` is empty or does not hold images in 0-255.
        """
        x = image_source(x, "x", allow_nan=True)
        if hasattr(x, "shape") and steps is None:
            x, batch_size = batches_of(x, 32 if batch_size is None else batch_size), None
        return super().predict(x, batch_size, verbose, steps, callbacks)

    def predict_on_batch(self, x: Array) -> dict[str, np.ndarray]:
        """`keras.Model.predict_on_batch`: what `predict` returns, for one batch of images."""
        return super().predict_on_batch(image_array(x, "x", allow_nan=True))

    def save(self, filepath: str | os.PathLike, *args, **kwargs) -> None:
        """`keras.Model.save`, whole or not at all: a failed save leaves what was there."""
        files.save_keras(super().save, filepath, *args, **kwargs)

    def features(self, images: Array) -> tf.Tensor:
        """Return the extractor's features of a batch of images, or feature maps.

        Args:
            images: uint8 or float in 0-255, `(B, H, W, 3)`, of any height and width.

        Returns:
            Float32 tensor `(B, D)`; for a local detector, `(B, h, w, C)`.
        """
        return self.extractor(images)

    def recalibrate(
        self,
        images: Array | None = None,
        false_positive_rate: float | None = None,
        *,
        batch_size: int | None = None,
        verbose: int | str = "auto",
    ) -> None:
        """Calibrate on other images, or change the false positive rate, or both, in place.

        Args:
            images: In-distribution images that are neither trained on nor in the bank, as for
                `from_images`. None keeps the calibration scores.
            false_positive_rate: Largest share of normal images to flag, between 0 and 1. None
                keeps the rate.
            batch_size: Images per step; a dataset has its own.
            verbose: 0 is silent, 1 shows a progress bar, 2 one line; `"auto"` shows the bar where
                there is more than one step.

        Raises:
            ValueError: If both are None or there are too few calibration images for the rate; the
                detector then stays as it was.
        """
        if images is None and false_positive_rate is None:
            raise ValueError("Pass `images`, `false_positive_rate` or both. Received: neither.")
        rate = self.false_positive_rate if false_positive_rate is None else false_positive_rate
        if images is None:
            self._set_rate(rate)
            return
        self._calibrate(self._scores_to_calibrate(images, batch_size, verbose), rate)

    def extend(
        self, images: Array, *, batch_size: int | None = None, verbose: int | str = "auto"
    ) -> None:
        """Treat images, such as false alarms, as normal from now on, in place, without training.

        Their features join the bank; for a local detector, only those of places that stood out,
        which score above the lowest calibration score. The calibration does not change. With one
        nearest row (`k=1`, as local detectors have), scores can only fall, so the promise still
        holds. Otherwise, or to flag as many as promised and no fewer, call `recalibrate` with
        images that are not in the bank, never with these. Where all rows count (`k=None`), a few
        images change a mean over thousands, so that they may still be flagged.

        A second voice stays as it is: what looks like the auxiliary images is still flagged. In an
        aligned detector, what joins the bank counts as normal at every place.

        Args:
            images: In-distribution images, as for `from_images`.
            batch_size: Images per step; a dataset has its own.
            verbose: As for `recalibrate`.

        Example:
        >>> false_alarms = [path for path in flagged if inspector_says_good(path)]
        >>> detector.extend(sddns_tf.data.load_arrays("false_alarms", image_size=256))
        """
        found = [self._rows_of(f) for f in self._stream(images, batch_size, verbose)]
        rows = np.concatenate([self.bank.numpy(), *found])
        weights, scores = self.bank_weights.numpy(), self.calibration_scores.numpy()
        # A new row gets the average weight of the bank's rows.
        weights = np.pad(weights, (0, len(rows) - len(weights)), constant_values=weights.mean())
        rate = self.false_positive_rate
        self._make_state(len(rows), len(scores))
        self.bank.assign(rows)
        self.bank_weights.assign(weights / weights.sum())
        self.calibration_scores.assign(scores)
        self._set_rate(rate)
        self.predict_function = None  # It was traced with the old bank.

    def _rows_of(self, features):
        """Return the features that join a bank."""
        if not self.is_local:
            building.check_finite(features, "new")
            return features
        # Each by itself: once these are in the bank, no mean over places can stand out either.
        maps = self.scores(features, smooth=False)["anomaly_map"]
        places = features[maps > self.calibration_scores[0]]
        building.check_finite(places, "new", "places")
        return places

    @property
    def is_local(self) -> bool:
        """Whether places are compared, and answers include an `anomaly_map`."""
        return self.extractor.map_size is not None

    @property
    def false_positive_rate(self) -> float:
        """Largest share of exchangeable normal images that is flagged."""
        return float(str(self.rate.numpy()))  # The shortest decimal: 0.05, not 0.0500000007.

    @property
    def threshold(self) -> float:
        """The `ood_score` above which images are flagged."""
        return float(self.calibration_scores.numpy()[-int(self.largest_flagged_rank.numpy())])

    @property
    def lowest_score(self) -> float:
        """The score of what is in the bank: no score is lower."""
        return (self.offset - 1.0) / self.temperature

    @property
    def rounding(self) -> float:
        """How much the score of one image may vary with its batch.

        A score at most this far above a calibration score counts as equal to it, so that equal
        images get equal answers. See `snapped`.
        """
        return rounding(1.0 / self.steepness, self.extractor.standardized)

    @property
    def steepness(self) -> float:
        """How much a score may change for a change of similarity: the second voice adds to it."""
        if not self.auxiliary_weight:
            return 1.0 / self.temperature
        with tf.init_scope():  # A number in a graph as well: the direction never changes.
            slope = float(np.linalg.norm(self.auxiliary_direction.numpy()))
        # Standardized features are as long as the square root of their number, others as 1.
        length = math.sqrt(self.extractor.feature_dim) if self.extractor.standardized else 1.0
        return 1.0 / self.temperature + self.auxiliary_weight * slope * length

    def _stream(self, images, batch_size, verbose):
        return stream_features(self.extractor, images, batch_size=batch_size, verbose=verbose)

    def _scores_to_calibrate(self, images, batch_size, verbose):
        """Return scores of calibration images, and warn of those that are in the bank."""
        found, kept, shared = [], [], 0
        for features in self._stream(images, batch_size, verbose):
            found.append(self._scores(features))
            if not self.is_local:
                kept.append(features)
        scores = np.concatenate(found)
        if not self.is_local:
            shared = building.count_shared(self.bank.numpy(), np.concatenate(kept))
        elif not self.extractor.aligned:
            shared = np.count_nonzero(scores <= self.lowest_score + self.rounding)
        building.warn_of_shared_images(shared, len(scores))
        return scores

    def _scores(self, features):
        """Return scores `(N,)` of calibration features, a few at a time."""
        building.check_finite(features.reshape(len(features), -1), "calibration")
        step = images_per_step(self.extractor)
        return np.concatenate(
            [
                self.scores(features[start : start + step])["ood_score"]
                for start in range(0, len(features), step)
            ]
        )

    def _calibrate(self, scores, false_positive_rate):
        """Store the scores of calibration images and set the threshold."""
        largest_flagged_rank(len(scores), false_positive_rate)
        scores = merged(scores, self.rounding)
        if len(scores) != self.calibration_scores.shape[0]:
            del self.calibration_scores
            self.calibration_scores = self._add_calibration_scores(len(scores))
            self.predict_function = None  # It was traced with the old scores.
        self.calibration_scores.assign(scores)
        self._set_rate(false_positive_rate)

    def _set_rate(self, false_positive_rate):
        size = self.calibration_scores.shape[0]
        self.largest_flagged_rank.assign(largest_flagged_rank(size, false_positive_rate))
        self.rate.assign(false_positive_rate)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "name": self.name,
            "extractor": keras.saving.serialize_keras_object(self.extractor),
            "bank_size": self.bank.shape[0],
            "calibration_size": self.calibration_scores.shape[0],
            "temperature": self.temperature,
            "offset": self.offset,
            "k": self.k,
            "smoothing": self.smoothing,
            "auxiliary_weight": self.auxiliary_weight,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the detector that a configuration describes, its bank still empty."""
        extractor = keras.saving.deserialize_keras_object(config["extractor"])
        return cls(**{**config, "extractor": extractor})


def _compressed(features, size, method, seed, extractor):
    """Return rows of a smaller bank and their weights."""
    if extractor.map_size is None:
        return compress(features, size, method, seed, metric=extractor.metric)
    # Of an aligned detector the first row is the mean of every place; others are of `extend`.
    kept = 1 if extractor.aligned else 0
    rows = features[:kept]
    if size > kept and len(features) > kept:
        rows = np.concatenate([rows, coreset(features[kept:], size - kept, seed)])
    return rows, np.full(len(rows), 1.0 / len(rows), np.float32)


def pretrained(name: str = "cifar10-small") -> Detector:
    """Return a trained and calibrated detector that ships with the package.

    `"cifar10-small"`: `ConvNet()` trained for 46 passes over CIFAR-10's training images, 90 minutes
    of one CPU core, with rotated auxiliary images as negatives. Its bank has 1,000 weighted
    centers. Calibrated at a false positive rate of 0.05 on 2,500 test images (every other one of
    the first 5,000, starting with the first). It flags 5.4 % of the others of these. Test images
    against other sets:

    | AUROC | CIFAR-100 | DTD | GTSRB | MNIST |
    |---|---|---|---|---|
    | this detector | 0.602 | 0.820 | 0.854 | 0.988 |
    | a network like it before training, mean of five | 0.592 | 0.791 | 0.718 | 0.785 |

    (The second row is from up to 2,000 images of each, and the paper's cosines.)

    Its features begin to be semantic: their nearest neighbors give the right CIFAR-10 class in 58 %
    of cases, those of raw pixels in 39 %. It shows how to use a detector and finds what looks very
    different. It hardly tells CIFAR-100 from CIFAR-10, so it is no detector of unknown objects.
    docs/results.md has the commands that make it and measure it.

    Args:
        name: String, one of `PRETRAINED`.

    Returns:
        A `Detector` for images uint8 or float in 0-255, `(B, H, W, 3)`, ideally of 32 px.

    Raises:
        ValueError: If there is none by that name.

    Example:
    >>> detector = sddns_tf.pretrained("cifar10-small")
    >>> detector.predict(images)["p_value"]

    Reference:
        Rafiee et al., arXiv 2201.06378; Krizhevsky, "Learning multiple layers of features from
        tiny images", 2009.
    """
    if name not in PRETRAINED:
        raise ValueError(f"`name` must be one of {list(PRETRAINED)}. Received: {name!r}")
    return keras.saving.load_model(_TRAINED / f"{name}.keras", compile=False)
