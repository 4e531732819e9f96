"""Views and negatives made by Pillow image by image, as in the authors' program."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps


def all_views():
    """Return a function from an image and an auxiliary image to their 28 views."""
    draw = np.random.default_rng(0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def crop(image, area, size):
        for _ in range(10):
            target = draw.uniform(*area) * image.width * image.height
            ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
            width, height = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
            if 0 < width <= image.width and 0 < height <= image.height:
                break
        else:
            width, height = image.size
        left = draw.integers(image.width - width + 1)
        top = draw.integers(image.height - height + 1)
        box = (left, top, left + width, top + height)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)

    def shift_hue(image, turns):
        hue, saturation, value = image.convert("HSV").split()
        hue = Image.fromarray(np.asarray(hue) + np.uint8(int(turns * 255) % 256))
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    def jitter(image):
        changes = [
            (ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4),
            (ImageEnhance.Color, 0.2), (None, 0.1),
        ]  # fmt: skip
        for index in draw.permutation(4):
            enhancer, change = changes[index]
            amount = draw.uniform(-change, change)
            image = enhancer(image).enhance(1 + amount) if enhancer else shift_hue(image, amount)
        return image

    def view(image, area, size, blur, solarize):
        image = crop(image, area, size)
        if draw.random() < 0.5:
            image = ImageOps.mirror(image)
        if draw.random() < 0.8:
            image = jitter(image)
        if draw.random() < 0.2:
            image = image.convert("L").convert("RGB")
        if draw.random() < blur:
            image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.1, 2.0) * size / 224))
        if draw.random() < solarize:
            image = ImageOps.solarize(image, 128)
        return image

    def normalized(image):
        return (np.asarray(image, np.float32) / 255 - mean) / std

    def views(image, auxiliary):
        image, auxiliary = Image.fromarray(image), Image.fromarray(auxiliary)
        found = [view(image, (0.4, 1), 32, 1.0, 0.0), view(image, (0.4, 1), 32, 0.1, 0.2)]
        found += [view(image, (0.05, 0.4), 16, 0.5, 0.0) for _ in range(8)]
        for source in (image, auxiliary):
            recipe = [(1.0, 0.0), (0.1, 0.2)][draw.integers(2)]
            shifted = [view(source, (0.4, 1), 32, *recipe)]
            shifted += [view(source, (0.05, 0.4), 16, 0.5, 0.0) for _ in range(8)]
            found += [one.rotate(90 * draw.integers(1, 4)) for one in shifted]
        return [normalized(one) for one in found]

    return views
