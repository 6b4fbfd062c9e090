"""A plug-in of sopdeploy: compact, kernel and low-rank bilinear pooling, NetVLAD, NetFV and DropCov."""
