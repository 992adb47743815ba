"""Trackers that come with core, as plugins like any other: each sees a run through `mindprint_event` alone."""
