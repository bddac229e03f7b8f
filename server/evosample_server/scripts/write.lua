-- Writes one block of a plan that is registered: one that was collected meanwhile must not come back.
-- KEYS: head, plans, block. ARGV: uid, plan_id, bytes. Returns 1, or 0 if the plan or the experiment is gone.
if redis.call('HGET', KEYS[1], 'uid') ~= ARGV[1] or redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
  return 0
end
redis.call('SET', KEYS[3], ARGV[3])
return 1
