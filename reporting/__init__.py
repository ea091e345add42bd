"""The report: a page of run folders that needs nothing beside it. Of ours it imports two files of the engine."""
