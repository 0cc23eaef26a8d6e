"""Foreign protocols in front of the same service: each translates, and adds no state of its own."""

from __future__ import annotations

from fastapi import FastAPI

from tinyvit.serve.service import Service
from tinyvit.serve.settings import ServeSettings


def add(api: FastAPI, service: Service, settings: ServeSettings) -> None:
    """Give an application the routes of the adapters that the settings name."""
    from . import label_studio, x_anylabeling

    if "label-studio" in settings.adapters:
        label_studio.add(api, service, settings)
    if "x-anylabeling" in settings.adapters:
        x_anylabeling.add(api, service, settings)
