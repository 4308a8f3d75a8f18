"""Agent processes: started from a snapshot, recorded, signalled, stopped, never orphaned."""
