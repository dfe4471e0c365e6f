"""Synthetic scenes in which one attribute varies: sampled as data, rendered by two renderers, stored as datasets."""

from .description import Camera, Light, Material, Scene, Shape
from .sampling import AttributeRecipe, sample_scene

__all__ = ["AttributeRecipe", "Camera", "Light", "Material", "Scene", "Shape", "sample_scene"]
