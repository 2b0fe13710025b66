"""The middle floor: replicas on Ray, the scheduler, Parquet shards and run directories. Holds no probability."""
