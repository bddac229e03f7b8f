-- Removes columns of a past epoch's table, unless the head has gone back to it.
-- KEYS: head, column block, ... ARGV: uid, plan_id
local h = redis.call('HMGET', KEYS[1], 'uid', 'plan_id')
if h[1] == ARGV[1] and h[2] ~= ARGV[2] then
  redis.call('UNLINK', unpack(KEYS, 2))
end
