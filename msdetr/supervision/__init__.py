"""Supervision: which branch is matched with the targets, by which matcher, under which losses."""
