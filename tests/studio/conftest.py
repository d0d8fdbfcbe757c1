"""Fixtures of the page's tests."""

from helpers.studio_page import browser, page, server  # noqa: F401
