-- Registers a plan, so that its columns are found again whatever happens to its planner.
-- KEYS: head, plans. ARGV: uid, plan_id, epoch. Returns 1, or 0 if the experiment is gone.
if redis.call('HGET', KEYS[1], 'uid') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
