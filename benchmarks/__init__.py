"""leanserve and its peers on the same application, in turn; figures are compared as ratios only."""
