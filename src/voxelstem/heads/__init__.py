"""What stands above frozen features: attention, queries, boxes, neighbours, many labels, and risks."""
