"""Trackers that come with core. They are plugins like any other, and see a run through `mindprint_event` alone."""
