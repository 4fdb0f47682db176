"""Schedules: how the loops that TVM's operators leave plain become parallel, blocked and vectorised ones."""
