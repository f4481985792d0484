"""Serving: scheduler, expert store, caches."""
