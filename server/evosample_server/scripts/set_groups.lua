-- Makes written columns of groups those of the experiment. Those before are to be removed.
-- KEYS: head, plans, doomed. ARGV: uid, id of the columns, samples that they are of, digest of them, spec that has these samples.
-- Returns 1, or 0 if the experiment or the columns are gone, or samples were added meanwhile.
local h = redis.call('HMGET', KEYS[1], 'uid', 'spec', 'next_spec')
if h[1] ~= ARGV[1] or (h[3] or h[2]) ~= ARGV[5] or redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then
  return 0
end
local before = redis.call('HGET', KEYS[1], 'groups_id')
if before and before ~= ARGV[2] then
  local epoch = redis.call('HGET', KEYS[2], before)
  redis.call('HDEL', KEYS[2], before)
  redis.call('HSET', KEYS[3], before, epoch or '')
end
redis.call('HSET', KEYS[1], 'groups_id', ARGV[2], 'groups_size', ARGV[3], 'groups_digest', ARGV[4],
  'groups_spec', ARGV[5])
return 1
