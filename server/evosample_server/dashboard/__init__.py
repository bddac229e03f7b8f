"""The dashboard: web pages about a server's experiments. It alone imports NiceGUI, and only --http imports it."""

from __future__ import annotations

from evosample_server.dashboard.site import Dashboard

__all__ = ["Dashboard"]
