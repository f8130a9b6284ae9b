"""What an EnginePool is made of: who decides, who routes, who looks after the replicas."""
